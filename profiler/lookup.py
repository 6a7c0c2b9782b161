"""Which profiles a command takes: those named, else one's own, else LobRA's published ones.

LobRA's keep its authors' file names (``..._llama_7B...``), which nothing that is measured or
estimated here is written to. Times and capacities are taken from one source: one's own times are
never combined with LobRA's capacities unless both are named.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lobra.common.errors import Problems
from lobra.profiler.profiles import (
    PROFILE_DIR,
    default_memory_path,
    default_time_path,
    model_slug,
)
from lobra.profiler.sidecar import PUBLISHED, read_meta

OF_TASKS = re.compile(r"_(\d+)tasks$")  # the end of a memory profile's name


def published_time_path(model: str) -> Path:
    """Return where a model's time profile lies under the name that LobRA's authors gave it."""
    return PROFILE_DIR / "cost_model" / f"profile_time_llama_{model_slug(model)}.csv"


def published_memory_path(model: str, num_tasks: int) -> Path:
    """Return LobRA's memory profile of a model for the nearest number of tasks there is."""
    name = f"max_tokens_llama_{model_slug(model)}"
    found = _nearest(PROFILE_DIR / "memory", name, num_tasks)
    return found or PROFILE_DIR / "memory" / f"{name}_{num_tasks}tasks.csv"


def profiled_name(model: str, base_precision: str | None) -> str:
    """Return what a model is called in the names of its profiles: quantised, it is another."""
    return model if base_precision in (None, "bf16") else f"{model}_{base_precision}"


def time_path(model: str, base_precision: str | None = None) -> Path:
    """Return the model's own time profile, else LobRA's; where one's own would be if none is."""
    model = profiled_name(model, base_precision)
    own, published = default_time_path(model), published_time_path(model)
    return published if published.is_file() and not own.is_file() else own


def own_memory_path(model: str, num_tasks: int, base_precision: str | None = None) -> Path:
    """Return the model's own memory profile, else that of the nearest number of tasks with parts.

    Where the first would be if there is none.
    """
    model = profiled_name(model, base_precision)
    own = default_memory_path(model, num_tasks)
    if own.is_file():
        return own
    name = f"max_tokens_{model_slug(model)}"
    return _nearest(own.parent, name, num_tasks, with_parts=True) or own


def planning_paths(
    model: str, num_tasks: int, time: Path | None = None, memory: Path | None = None,
    base_precision: str | None = None,
) -> tuple[Path, Path]:  # fmt: skip
    """Return the time and memory profiles to plan with; ``time`` and ``memory`` are those named.

    LobRA's are taken where neither an own profile nor another one is named.

    Raises
    ------
    ConfigError
        For every one that is missing, with the ways to get it.
    """
    name = profiled_name(model, base_precision)
    published = published_time_path(name), published_memory_path(name, num_tasks)
    own = default_time_path(name), own_memory_path(name, num_tasks)
    here = [
        one if one is not None or not path.is_file() else path
        for one, path in zip((time, memory), own, strict=True)
    ]
    if all(one in (None, path) for one, path in zip(here, published, strict=True)) and all(
        path.is_file() for path in published
    ):
        return published
    found = here[0] or own[0], here[1] or own[1]
    problems = Problems()
    if not os.path.exists(found[0]):  # False for names that no file can have
        problems.add(no_time_profile(model, found[0], base_precision))
    if not os.path.exists(found[1]):
        problems.add(no_memory_profile(model, num_tasks, found[1], base_precision))
    problems.raise_if_any()
    return found


def no_time_profile(model: str, path: Path, base_precision: str | None = None) -> str:
    """Return what is told where a model's time profile is missing: every way to get one."""
    command = f"lobra profile time --model {model} --tp 1,2,4{_option(base_precision)}"
    published = published_time_path(profiled_name(model, base_precision))
    return _ways(path, command, "--time-profile", published)


def no_memory_profile(
    model: str, num_tasks: int, path: Path, base_precision: str | None = None
) -> str:
    """Return what is told where a model's memory profile is missing: every way to get one."""
    command = f"lobra profile memory --model {model} --num-gpus N --trainer-config NAME"
    published = published_memory_path(profiled_name(model, base_precision), num_tasks)
    return _ways(path, command + _option(base_precision), "--memory-profile", published)


def provenance_note(path: Path) -> str | None:
    """Return for what hardware a profile was estimated or published; None of one's own."""
    meta = read_meta(path)
    if meta.get("kind") == "estimated":
        hardware = meta.get("settings", {}).get("accelerator", {}).get("name", "")
        return f"{path}: ESTIMATED for {hardware}, not measured"
    if meta.get("kind") != PUBLISHED:
        return None
    hardware = meta.get("environment", {}).get("hardware", {}).get("name", "other hardware")
    return f"{path}: {meta.get('source', PUBLISHED)} on {hardware}; yours will cost otherwise"


def base_precision_problem(path: Path, quantised: str | None) -> str | None:
    """Return why a profile is not of a base whose linears are kept so, None if it is."""
    made_for = read_meta(path).get("settings", {}).get("base_precision")
    if made_for == quantised:
        return None
    names = (f"in {name}" if name else "not quantised" for name in (made_for, quantised))
    return f"{path}: is of a base {', this one is '.join(names)}"


def _option(base_precision: str | None) -> str:
    return "" if base_precision is None else f" --base-precision {base_precision}"


def _ways(path: Path, command: str, option: str, published: Path) -> str:
    named = f", such as LobRA's {published}" if published.is_file() else ""
    return (
        f"{path}: no such profile; measure it with `{command}`, or estimate it without a GPU "
        f"(`{command} --estimate --accelerator A100-40GB`), or name another with {option}{named}"
    )


def _nearest(folder: Path, name: str, num_tasks: int, with_parts: bool = False) -> Path | None:
    """Return the profile ``<name>_<n>tasks.csv`` of the nearest number of tasks, None without."""
    found = []
    for path in sorted(folder.glob(f"{name}_*tasks.csv")):
        number = OF_TASKS.search(path.stem)
        if not number or path.stem != name + number[0]:
            continue
        rows = read_meta(path).get("rows", {}) if with_parts else {}
        if not with_parts or any("parts" in details for details in rows.values()):
            found.append((abs(int(number[1]) - num_tasks), path))
    return min(found)[1] if found else None
