"""What `scripts/create_finetune_datasets.sh` runs: fetch the published data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.errors import ConfigError
from tasks.published import DATASETS, check_names, fetch


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the data sets named (all twelve by default), those that are there already left out."""
    parser = argparse.ArgumentParser(
        prog="create_finetune_datasets.sh",
        description="Fetch and convert LobRA's public data sets into <data-dir>/<name>.jsonl.",
        epilog=f"data sets: {', '.join(DATASETS)}",
    )
    parser.add_argument("dataset", nargs="*", metavar="DATASET", help="default: all twelve")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    args = parser.parse_args(argv)
    failures = 0
    try:
        for name in check_names(args.dataset):
            path = args.data_dir / f"{name}.jsonl"
            if path.is_file():
                print(f"{name}: {path} is there already")
                continue
            try:
                path, count = fetch(name, args.data_dir)
            except ConfigError as error:
                print(error, file=sys.stderr)
                failures += 1
            else:
                print(f"{name}: {count} rows in {path}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
