"""Conversion between Hugging Face checkpoints and this project's Orbax checkpoints, inspection and verification."""

from checkpoints_tools.inspection import inspect as inspect
from checkpoints_tools.to_huggingface import convert_to_huggingface as convert_to_huggingface
from checkpoints_tools.to_orbax import convert_to_orbax as convert_to_orbax
from checkpoints_tools.verification import verify as verify
