"""Model code: `import mogul.models` registers the architectures and the experts implementation.

After it, `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the model types "moge" and
"PanguProMoE", and every mixture-of-experts model of Transformers accepts
`experts_implementation="mogul"`.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from mogul.models import conversion, experts
from mogul.models.experts import experts_backend
from mogul.models.load import load_config, load_model, load_tokenizer
from mogul.models.moge.configuration_moge import MogeConfig, PanguProMoEConfig
from mogul.models.moge.modeling_moge import (
    MogeForCausalLM,
    MogeForSequenceClassification,
    MogeForTokenClassification,
    MogeModel,
    PanguProMoEForCausalLM,
    PanguProMoEModel,
)
from mogul.models.upcycle import upcycle, upcycle_checkpoint


def register() -> None:
    """Register everything with Transformers; calling it again changes nothing."""
    AutoConfig.register("moge", MogeConfig, exist_ok=True)
    AutoConfig.register("PanguProMoE", PanguProMoEConfig, exist_ok=True)
    AutoModel.register(MogeConfig, MogeModel, exist_ok=True)
    AutoModel.register(PanguProMoEConfig, PanguProMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(MogeConfig, MogeForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(PanguProMoEConfig, PanguProMoEForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MogeConfig, MogeForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(MogeConfig, MogeForTokenClassification, exist_ok=True)
    conversion.register()
    experts.register()


register()

__all__ = [
    "MogeConfig",
    "MogeForCausalLM",
    "MogeForSequenceClassification",
    "MogeForTokenClassification",
    "MogeModel",
    "PanguProMoEConfig",
    "PanguProMoEForCausalLM",
    "PanguProMoEModel",
    "experts_backend",
    "load_config",
    "load_model",
    "load_tokenizer",
    "register",
    "upcycle",
    "upcycle_checkpoint",
]
