"""Released configurations: as many parameters as transformers' own model has, built of nothing but shapes."""

from typing import Any

import pytest

pytest.importorskip("torch")

from ef_jax.families import spec_from_config
from ef_jax.memory.parameters import count_parameters
from tests.released import RELEASED, read_config

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def stored_elements(config: dict[str, Any]) -> int:
    """Elements of the model's parameters, each once, and of the buffers that are stored beside them."""
    import torch
    import transformers

    config = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    config = dict(config.get("text_config", config))
    kind = config.pop("model_type")
    # Kimi-K2 is DeepSeek-V3 under another name, which transformers knows from the checkpoint's own code alone.
    made = transformers.AutoConfig.for_model("deepseek_v3" if kind == "kimi_k2" else kind, **config)
    auto = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(made)
    stored = model.state_dict().keys()
    return sum(parameter.numel() for parameter in model.parameters()) + sum(
        buffer.numel() for name, buffer in model.named_buffers() if name in stored
    )


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_transformers(name: str) -> None:
    config = read_config(name)
    assert count_parameters(spec_from_config(config)).total == stored_elements(config)
