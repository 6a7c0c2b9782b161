"""`lobra export`: a model folder with adapters merged into the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lobra.commands.adapter_folder import adapter_folder_problem
from lobra.common.errors import Problems
from lobra.common.options import ModelName, as_options
from lobra.model.folder import resolve_folder


@as_options
@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is merged into what.

    Parameters
    ----------
    adapter
        A folder in PEFT's format, such as runs/NAME/adapters/TASK (repeatable).
    weight
        What an adapter's update is multiplied by (repeatable, one an adapter, in their order; 1
        by default).
    output_dir
        The model folder to write.
    """

    model: ModelName
    adapter: tuple[Path, ...]
    weight: tuple[float, ...] = ()
    output_dir: Path


def export(*, options: ExportOptions) -> int:
    """Merge adapters into the base and write a model folder that needs no adapter.

    The weights have the base's dtype and lie in files as its own do; configuration and tokenizer
    are copied. Of several adapters, the weighted sum of their updates is merged.

      lobra export --model 7B --adapter runs/first/adapters/docstring --output-dir models/docs

    Raises
    ------
    ConfigError
        With every mistake of the options and the adapters.
    """
    problems = Problems(filter(None, map(adapter_folder_problem, options.adapter)))
    factors = options.weight or (1.0,) * len(options.adapter)
    if len(factors) != len(options.adapter):
        problems.add(f"--weight: {len(factors)} for {len(options.adapter)} adapters, want one each")
    if options.output_dir.exists():
        problems.add(f"--output-dir {options.output_dir}: is there already, give another folder")
    with problems.noted():
        base = resolve_folder(options.model)
    problems.raise_if_any()
    from lobra.trainer.merge import merge_problems, read_adapter, write_merged  # imports torch

    adapters = []
    for folder in options.adapter:
        with problems.noted():
            adapters.append(read_adapter(folder))
    with problems.noted():
        if len(adapters) == len(factors):
            problems += merge_problems(base, adapters, factors)
    problems.raise_if_any()
    write_merged(base, adapters, factors, options.output_dir)
    print(f"{options.output_dir}: {base} with {len(adapters)} adapters merged into it")
    return 0
