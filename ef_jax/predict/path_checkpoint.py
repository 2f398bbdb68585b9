"""What an interrupted training needs to go on: one npz file, written whole or not at all; nothing is pickled."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ef_jax.errors import InputError
from ef_jax.new_file import new_file

_HEAD = "head"


def save_checkpoint(path: Path, tree: Any, head: dict[str, Any]) -> None:
    """Write arrays and JSON, over what an earlier step left.

    Raises:
      InputError: it cannot be written.
    """
    arrays = {f"array_{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}
    with new_file(path, overwrite=True) as file:
        np.savez(file, **arrays, **{_HEAD: np.array(json.dumps(head))})  # type: ignore[arg-type]  # numpy's stub


def load_checkpoint(path: Path, tree: Any) -> tuple[Any, dict[str, Any]]:
    """Arrays in the structure of `tree`, and the JSON that came with them.

    Raises:
      InputError: the file is damaged, or its arrays are not as those of `tree`.
    """
    leaves, structure = jax.tree.flatten(tree)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            head = json.loads(str(archive[_HEAD]))
            arrays = [archive[f"array_{number}"] for number in range(len(leaves))]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"checkpoint {str(path)!r:.200} is damaged: {reason:.120}: train without --resume") from None
    for array, leaf in zip(arrays, leaves, strict=True):
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise InputError(f"checkpoint {str(path)!r:.200} is of another training: train without --resume")
    return jax.tree.unflatten(structure, [jax.numpy.asarray(array) for array in arrays]), head
