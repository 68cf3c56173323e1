"""What tells a model from another under the same name, without loading it.

Of a hub id it is the commit; of a local folder a digest of all its texts and of a piece of each
tensor. It goes into the digest of every table that the model makes, so that other weights make
another table, and workers compare it, so that no table is made by two.
"""

import hashlib
import json
import re
from itertools import chain
from pathlib import Path

from pixart_models.text import ModelFiles, ModelNotFound, ModelSpec, download, find_model

_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
_PIECE_BYTES = 4096


def model_revision(spec: ModelSpec, source: str) -> str:
    """Of a hub id its commit, for which only a config is downloaded; else see ``revision_of``.

    Raises ModelNotFound.
    """
    if source.startswith("builtin:"):
        return spec.built_in
    if Path(source).expanduser().is_dir():
        return revision_of(find_model(spec, source))
    root = download(spec, source, ["config.json", "model_index.json"])
    return revision_of(ModelFiles(root, root, ()))


def check_revision(spec: ModelSpec, source: str, wanted: str) -> None:
    """Raise ModelNotFound if this machine's is another revision than ``wanted``, if that is any."""
    found = model_revision(spec, source) if wanted else ""
    if found != wanted:
        why = (
            f"here it is revision {found}, but this table is made with {wanted}; put the same "
            f"files on every machine"
        )
        raise ModelNotFound(spec.kind, source, why)


def revision_of(files: ModelFiles) -> str:
    """16 hex digits over the texts, the weights' sizes and headers, and the first 4 KiB of each of
    their tensors, which any training moves: about a second for 20 GB.

    The hub's cache names a folder by its commit, which is taken instead.
    """
    root, folder, _ = files
    if root.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", root.name):
        return root.name
    digest = hashlib.sha256()
    kinds = (*_TEXTS, "*.safetensors")
    places = [*(folder.glob(k) for k in kinds), *((root / "tokenizer").glob(k) for k in kinds)]
    for path in sorted(set(chain.from_iterable(places))):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        if path.suffix == ".safetensors":
            _hash_weights(digest, path)
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _hash_weights(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        header = file.read(length)
        digest.update(header)
        try:
            tensors = json.loads(header)
            starts = sorted(entry["data_offsets"][0] for n, entry in tensors.items() if n[0] != "_")
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # no safetensors file; whoever loads it says so
        for start in starts:
            file.seek(8 + length + start)
            digest.update(file.read(_PIECE_BYTES))
