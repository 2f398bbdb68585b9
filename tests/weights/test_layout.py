import re

import numpy as np
import pytest

from ef_jax.families import spec_from_config
from ef_jax.nn import dense_shapes
from ef_jax.weights.layout import Layout, family_names, stored_experts
from tests.weights.synthetic import CONFIGS, hf_shapes

CASES = [(family, layout) for family in CONFIGS for layout in ("per_expert", "fused")]


@pytest.mark.parametrize(("family", "experts"), CASES)
def test_tensors_are_those_of_the_family(family: str, experts: str) -> None:
    config = CONFIGS[family]
    shapes = hf_shapes(config, fused=experts == "fused")
    spec = spec_from_config(config)
    assert stored_experts(spec, family_names(spec), shapes) == experts
    assert {name: shape for name, (shape, _) in Layout(spec, experts).tensors().items()} == shapes


@pytest.mark.parametrize("family", CONFIGS)
def test_dense_arrays_are_those_of_the_modules(family: str) -> None:
    spec = spec_from_config(CONFIGS[family])
    dense = Layout(spec, "per_expert").dense
    ours = {name: (source.shape, source.dtype or spec.dtype) for name, source in dense.items()}
    assert ours == {name: (struct.shape, struct.dtype.name) for name, struct in dense_shapes(spec).items()}


@pytest.mark.parametrize(("family", "experts"), CASES)
def test_pieces_fill_every_array_and_use_every_tensor_once(family: str, experts: str) -> None:
    spec = spec_from_config(CONFIGS[family])
    layout = Layout(spec, experts)
    arrays = [(source.shape, source.pieces) for source in layout.dense.values()]
    arrays += [
        (spec.block_shape, layout.block(layer, expert))
        for layer in spec.moe_layers
        for expert in range(spec.experts.count)
    ]
    used = {name: np.zeros(int(np.prod(shape)), int) for name, (shape, _) in layout.tensors().items()}
    for shape, pieces in arrays:
        filled = np.zeros(shape, int)
        for piece in pieces:
            view = piece.view(filled)
            assert view.shape == piece.shape
            view += 1
            used[piece.tensor][piece.start : piece.start + view.size] += 1
        assert (filled == 1).all()
    assert all((count == 1).all() for count in used.values())


@pytest.mark.parity
@pytest.mark.parametrize("family", CONFIGS)
def test_names_are_those_of_transformers(family: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(CONFIGS[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = Layout(spec_from_config(config), "fused").tensors()
    fused = {name: shape for name, (shape, _) in tensors.items()}
    assert {name: shape for name, shape in shapes.items() if not re.search("inv_freq", name)} == fused
