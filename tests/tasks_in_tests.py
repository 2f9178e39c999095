"""Tasks of lm-eval on documents made here: one of each kind of request."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

WORDS = ["apple", "stone", "river", "cloud", "lamp", "green", "seven", "paper"]


def write_tasks(directory: Path, says: tuple[int, str] = (0, "apple")) -> list[Path]:
    """The files of three tasks: choices among answers, likelihood of texts, and what a model says, which is right for
    the number of a document if it `says` that."""
    lines = [
        {"ask": f"{first} {second}", "options": [first, second, "none of them"], "right": int(number in (1, 2, 5)),
         "said": says[1] if number == says[0] else "zebra"}
        for number, (first, second) in enumerate(pairwise(WORDS))
    ]  # fmt: skip
    documents = directory / "documents.jsonl"
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\ntest_split: test\n"
    kinds = {
        # Examples come before each question, drawn from the documents.
        "choices": "num_fewshot: 2\nfewshot_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: 'Which of {{ask}}?'\ndoc_to_choice: options\n"
        "doc_to_target: right\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "texts": "num_fewshot: 0\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: 'A {{ask}} and {{options[0]}} are longer than what fits into a row of this model, so this text "
        "goes on for a while.'\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
        "says": "num_fewshot: 0\noutput_type: generate_until\ndoc_to_text: '{{ask}}'\ndoc_to_target: said\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 5, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    found = []
    for name, text in kinds.items():
        path = directory / f"{name}.yaml"
        path.write_text(f"task: {name}\n{common}{text}")
        found.append(path)
    return found
