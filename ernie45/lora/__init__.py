"""LoRA: adapters beside the weights of a model, put there from outside.

```
from ernie45 import ErnieForCausalLM, lora

model = ErnieForCausalLM.from_pretrained("baidu/ERNIE-4.5-0.3B-Paddle", quantization="wint4")
lora.apply(model, rank=16)
model.train()
optimizer = paddle.optimizer.AdamW(3e-4, parameters=lora.parameters(model))
...
lora.save(model, "adapters")  # and later lora.load(another_model, "adapters")
```
"""

from ernie45.lora.adapters import apply, disabled, merge, parameter_groups, parameters, remove, unmerge
from ernie45.lora.config import DEFAULT_TARGETS, LoraConfig
from ernie45.lora.files import load, save
from ernie45.lora.weight import LoraWeight

__all__ = [
    "DEFAULT_TARGETS",
    "LoraConfig",
    "LoraWeight",
    "apply",
    "disabled",
    "load",
    "merge",
    "parameter_groups",
    "parameters",
    "remove",
    "save",
    "unmerge",
]
