"""`python -m tierstore inspect`: what is in a checkpoint, in one file of it, or in a disk store."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tierstore.commands.showing import print_json, results, table
from tierstore.maintenance import Contents, describe
from tierstore.sizes import format_size
from tierstore.spec import TensorSpec, dtype_name

_EPILOG = """\
Only headers and indices are read, no weights, also where another process writes; nothing is changed (SQLite may put its two
empty side files beside the index of a store). `tierstore verify` reads everything and checks it.

example: tierstore inspect /models/llama
         tierstore inspect /nvme/cache --keys --json
"""
_LARGEST = 10


def add_command(commands: Any) -> None:
    """Add `inspect` to the subparsers of `python -m tierstore`."""
    parser = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, a safetensors file or a disk store",
        description="Show what is in a checkpoint directory, a file of one, or a disk store: tensors, bytes, dtypes, files, state.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="a checkpoint directory, a safetensors or torch.save file, an index of shards, or a disk store")
    parser.add_argument("--keys", action="store_true", help=f"list every tensor, not only the {_LARGEST} largest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show what is at a path; what cannot be read raises."""
    contents = describe(arguments.path)
    if arguments.json:
        print_json(_as_json(contents, keys=arguments.keys))
    else:
        _show(contents, keys=arguments.keys)
    return 0


def _largest(contents: Contents, *, keys: bool) -> list[tuple[str, TensorSpec, str]]:
    """Return the tensors to list: all by their keys, or the largest first."""
    rows = [(key, spec, file) for key, (spec, file) in contents.tensors.items()]
    return sorted(rows, key=lambda row: row[0]) if keys else sorted(rows, key=lambda row: (-row[1].nbytes, row[0]))[:_LARGEST]


def _dtypes(contents: Contents) -> dict[str, tuple[int, int]]:
    """Return tensors and bytes of each dtype, most bytes first."""
    counts, nbytes = Counter[str](), Counter[str]()
    for spec, _ in contents.tensors.values():
        counts[dtype_name(spec.dtype)] += 1
        nbytes[dtype_name(spec.dtype)] += spec.nbytes
    return {name: (counts[name], total) for name, total in nbytes.most_common()}


def _as_json(contents: Contents, *, keys: bool) -> dict[str, Any]:
    listed = [
        {"key": key, "dtype": dtype_name(spec.dtype), "shape": list(spec.shape), "bytes": spec.nbytes, "file": file}
        for key, spec, file in _largest(contents, keys=keys)
    ]
    found: dict[str, Any] = {
        "path": contents.path,
        "kind": contents.kind,
        "tensors": len(contents.tensors),
        "bytes": contents.nbytes,
        "dtypes": {name: {"tensors": number, "bytes": total} for name, (number, total) in _dtypes(contents).items()},
        "keys" if keys else "largest": listed,
        "files": {"count": len(contents.files), "bytes": sum(contents.files.values())},
        "facts": dict(contents.facts),
    }
    return found | {"file_bytes": dict(contents.files)} if keys else found


def _show(contents: Contents, *, keys: bool) -> None:
    console = results()
    console.print(f"{contents.path}: {contents.kind}", markup=False)
    files = f"{len(contents.files)} files of {format_size(sum(contents.files.values()))}"
    console.print(f"{len(contents.tensors)} tensors, {format_size(contents.nbytes)}, in {files}", markup=False)
    console.print(", ".join(f"{name}: {value}" for name, value in contents.facts.items()), markup=False)
    rows = [(name, str(number), format_size(total)) for name, (number, total) in _dtypes(contents).items()]
    console.print(table("dtypes", ("dtype", "tensors", "bytes"), rows))
    listed = [(key, dtype_name(spec.dtype), str(list(spec.shape)), format_size(spec.nbytes), file) for key, spec, file in _largest(
        contents, keys=keys
    )]  # fmt: skip
    title = "tensors" if keys else "largest tensors"
    console.print(table(title, ("key", "dtype", "shape", "bytes", "file"), [_printable(row) for row in listed], left=3))


def _printable(row: tuple[str, ...]) -> list[str]:
    """Escape what no terminal can print: keys may be any str."""
    return [cell if cell.isprintable() else ascii(cell) for cell in row]
