"""What a checkpoint that cannot be used ends in."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or written. The message names the file or tensor and the fix."""
