"""Whether the files of an Orbax checkpoint are all there, as long as they were written; their values are not read.

STEP/_CHECKPOINT_METADATA    the names of its items, written last
STEP/ITEM/_METADATA          the leaves of an item
STEP/ITEM/manifest.ocdbt     the root of a B+tree, whose nodes and values lie in other files, each at an offset and of a length
"""

import json
from collections import defaultdict
from typing import Any

import tensorstore as ts
from etils import epath

METADATA = "_CHECKPOINT_METADATA"


def damage(folder: epath.Path) -> str:
    """What is wrong with the checkpoint in `folder`, in a few words; empty if it is whole."""
    at = METADATA
    try:
        for at in (METADATA, *json.loads((folder / METADATA).read_text())["item_handlers"]):
            if at != METADATA:
                _require_whole(folder / at)
    except FileNotFoundError as error:
        return f"{str(error.filename).removeprefix(f'{folder}/')} is absent"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{at} cannot be read"
    return ""


def _require_whole(item: epath.Path) -> None:
    """An error unless the files of one item can be read and are as long as the B+tree says."""
    for file in (item / "_METADATA", *item.glob("array_metadatas/*")):
        json.loads(file.read_text())
    for name, end in _ends(item).items():
        with (item / name).open("rb") as file:
            file.seek(end - 1)
            if not file.read(1):
                raise ValueError(f"{item / name}: shorter than {end} bytes")


def _ends(item: epath.Path) -> dict[str, int]:
    """By the names of the files that the B+tree of `item` refers to, the end of the last piece it has there."""
    root = str(item.absolute()) + "/"
    store = ts.KvStore.open(root if "://" in root else {"driver": "file", "path": root}).result()
    ends: dict[str, int] = defaultdict(int)
    # A manifest names the root of each version, a node its children or its values.
    locations = [ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while locations:
        location = locations.pop()
        kind, base, name, offset, length = location.split(":")
        ends[base + name] = max(ends[base + name], int(offset) + int(length))
        if kind == "btreenode":
            node: dict[str, Any] = ts.ocdbt.dump(store, location).result()
            locations += [entry[key] for entry in node["entries"] for key in ("location", "indirect_value") if key in entry]
    return ends
