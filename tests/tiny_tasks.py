"""Small tasks for lm-eval, of each kind, with data of their own."""

from pathlib import Path

UTILS = """
import datasets

WORDS = ["song", "gate", "old", "sung", "print", "x1", "the", "at"]


def load(**_):
    documents = [
        {"question": f"The {a} number {i * 7} is", "choices": [WORDS[(i + 1) % 8], WORDS[i % 5]], "gold": i % 2}
        for i, a in enumerate(WORDS[:7] * 2)
    ]
    return {name: datasets.Dataset.from_list(documents[part]) for name, part in
            (("shots", slice(0, 7)), ("test", slice(7, 14)))}
"""
SHARED = """
custom_dataset: !function utils.load
test_split: test
doc_to_text: question
"""
TASKS = {
    # Shots are drawn at random, anew for each document.
    "tiny_choice": """
output_type: multiple_choice
fewshot_split: shots
num_fewshot: 2
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: word, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_long": """
output_type: generate_until
doc_to_target: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 9999}
metric_list: [{metric: exact_match}]
""",
    "tiny_code": """
output_type: generate_until
unsafe_code: true
doc_to_target: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}
GROUPS = {
    "tiny_mean": """
group: tiny_mean
task: [tiny_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""",
    "tiny_all": """
group: tiny_all
task: [tiny_mean, tiny_text]
""",
}


def write_tasks(folder: Path) -> None:
    """Write them as lm-eval's ``include_path`` wants them."""
    (folder / "utils.py").write_text(UTILS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{SHARED}{text}")
    for name, text in GROUPS.items():
        (folder / f"{name}.yaml").write_text(text)
