"""What tells a model from another under the same name, without loading it.

Of a hub id it is the commit; of a local folder a digest of all its texts and of parts of its
weights. It goes into the digest of every table that the model makes, so that other weights make
another table.
"""

import hashlib
from pathlib import Path

from pixart_models.text import ModelSpec, download, find_model

_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
_PIECE, _NUM_PIECES = 4096, 64


def model_revision(spec: ModelSpec, source: str) -> str:
    """Of a hub id its commit, for which only a config is downloaded; else see ``revision_of``.

    Raises ModelNotFound.
    """
    if source.startswith("builtin:"):
        return "1"
    if Path(source).expanduser().is_dir():
        return revision_of(find_model(spec, source).folder)
    return revision_of(download(spec, source, ["config.json", "model_index.json"]))


def revision_of(folder: Path) -> str:
    """16 hex digits over names, sizes and contents of the texts, and names, sizes, headers and 64
    evenly spaced pieces of the weights: milliseconds, and any training moves some bit of them.

    The hub's cache names a folder by its commit, which is taken instead.
    """
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted({p for kind in (*_TEXTS, "*.safetensors") for p in folder.glob(kind)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            head = file.read(8)
            digest.update(head + file.read(min(int.from_bytes(head, "little"), 2**27)))
            for i in range(_NUM_PIECES):
                file.seek(i * size // _NUM_PIECES)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
