"""The twelve public data sets of LobRA's experiments: where they are and how their rows convert.

Names are those of LobRA's trainer configurations, hub names those its paper lists. Every row
becomes alpaca fields (``instruction``, ``input``, ``output``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError, did_you_mean
from lobra.common.files import atomic_path

HUB_TIMEOUT_S = 15.0
Fields = Mapping[str, Any]
Alpaca = dict[str, str]


@dataclass(frozen=True)
class PublishedDataset:
    """A data set on the hub.

    Attributes
    ----------
    hub_name, configuration
        What to load; the training split is taken.
    convert
        One of its rows -> alpaca fields.
    """

    hub_name: str
    configuration: str | None
    convert: Callable[[Fields], Alpaca]


def fields(instruction: str, output: str, context: str | None = None) -> Callable[[Fields], Alpaca]:
    """Return a conversion that takes the columns of these names."""

    def convert(row: Fields) -> Alpaca:
        return {
            "instruction": str(row[instruction] or ""),
            "input": str(row[context] or "") if context else "",
            "output": str(row[output] or ""),
        }

    return convert


def asked(instruction: str, context: str, output: str) -> Callable[[Fields], Alpaca]:
    """Return a conversion with a fixed instruction over the columns ``context`` and ``output``."""

    def convert(row: Fields) -> Alpaca:
        return {
            "instruction": instruction,
            "input": str(row[context] or ""),
            "output": str(row[output] or ""),
        }

    return convert


def _pubmedqa(row: Fields) -> Alpaca:
    """Convert a question with several paragraphs of context and a long answer."""
    context = row["context"]
    paragraphs = context["contexts"] if isinstance(context, Mapping) else context
    return {
        "instruction": str(row["question"] or ""),
        "input": "\n".join(map(str, paragraphs or ())),
        "output": str(row["long_answer"] or ""),
    }


DATASETS: Mapping[str, PublishedDataset] = {
    "dolly": PublishedDataset(
        "databricks/databricks-dolly-15k", None, fields("instruction", "response", "context")
    ),
    "python_code_instructions": PublishedDataset(
        "iamtarun/python_code_instructions_18k_alpaca",
        None,
        fields("instruction", "output", "input"),
    ),
    "evol_instruct": PublishedDataset(
        "ise-uiuc/Magicoder-Evol-Instruct-110K", None, fields("instruction", "response")
    ),
    "commitpackft": PublishedDataset(
        "chargoddard/commitpack-ft-instruct", None, fields("instruction", "output", "input")
    ),
    "MathInstruct": PublishedDataset(
        "TIGER-Lab/MathInstruct", None, fields("instruction", "output")
    ),
    "MetaMathQA": PublishedDataset("meta-math/MetaMathQA", None, fields("query", "response")),
    "NuminaMath-CoT": PublishedDataset("AI-MO/NuminaMath-CoT", None, fields("problem", "solution")),
    "PubMedQA": PublishedDataset("qiaojin/PubMedQA", "pqa_artificial", _pubmedqa),
    "xsum": PublishedDataset(
        "EdinburghNLP/xsum",
        None,
        asked("Summarise the article in one sentence.", "document", "summary"),
    ),
    "billsum": PublishedDataset(
        "FiscalNote/billsum", None, asked("Summarise the bill.", "text", "summary")
    ),
    "cnn_dailymail": PublishedDataset(
        "abisee/cnn_dailymail", "1.0.0", asked("Summarise the article.", "article", "highlights")
    ),
    "meetingbank": PublishedDataset(
        "huuuyeah/meetingbank", None, asked("Summarise the meeting.", "transcript", "summary")
    ),
}


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, each once, or all twelve if there is none.

    Raises
    ------
    ConfigError
        Naming every unknown one.
    """
    names = tuple(dict.fromkeys(names))
    problems = [
        f"data set {name!r}: unknown{did_you_mean(name, DATASETS)}; known are {', '.join(DATASETS)}"
        for name in names
        if name not in DATASETS
    ]
    if problems:
        raise ConfigError(problems)
    return names or tuple(DATASETS)


class HubUnreachable(ConfigError):
    """The hub does not answer at all, so no other data set will come either."""


def find_revision(name: str) -> str | None:
    """Return the commit of a data set that the hub has now; None where it works offline.

    Raises
    ------
    HubUnreachable
        If the hub does not answer.
    ConfigError
        If it refuses.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    hub_name = DATASETS[name].hub_name
    try:
        return HfApi().dataset_info(hub_name, timeout=HUB_TIMEOUT_S).sha
    except HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"data set {name}: {hub_name} could not be fetched: {type(error).__name__}: {first}"
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise HubUnreachable(
            f"the hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__}: {error}); "
            "set HTTPS_PROXY if a proxy is needed, or HF_ENDPOINT to a mirror, or copy the sets "
            "from a machine with network; what is fetched is kept, the same command goes on"
        ) from error


def fetch(name: str, data_dir: Path, revision: str | None = None) -> tuple[Path, int]:
    """Fetch and convert one data set into ``<data_dir>/<name>.jsonl``; return path and row count.

    ``revision``: the hub's commit; its newest if None.

    Raises
    ------
    ConfigError
        If the hub cannot be reached or gives something else than expected.
    """
    from datasets import load_dataset

    source = DATASETS[name]
    try:
        rows = load_dataset(source.hub_name, source.configuration, split="train", revision=revision)
    except Exception as error:  # network, access, a name gone: the library has dozens of its own
        raise ConfigError(
            f"data set {name}: {source.hub_name} could not be fetched: "
            f"{type(error).__name__}: {error}"
        ) from error
    path = data_dir / f"{name}.jsonl"
    return path, write_converted(rows, source, path)


def write_converted(rows: Iterable[Fields], source: PublishedDataset, path: Path) -> int:
    """Write the converted rows, those without an output left out; return how many there are.

    Raises
    ------
    ConfigError
        If a row lacks a column, or no row is left.
    """
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            try:
                converted = source.convert(row)
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"{source.hub_name}: row {number}: no usable {error}; its columns are "
                    f"{', '.join(row)}"
                ) from error
            if converted["output"].strip():
                file.write(json.dumps(converted, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise ConfigError(f"{source.hub_name}: no row has an output")
    return count
