"""Presets: YAML files, one folder per group. Read by `lightning_dsv3.config.presets`."""
