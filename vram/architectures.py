"""Every architecture whose layers were read from its code, by the name that config.json gives it.

What is not here is an error: a guess would place a model on a card that it does not fit.
"""

from collections.abc import Callable
from functools import partial

from vram.config_reader import ConfigReader
from vram.families import encoders, hybrids, latent, multimodal, nemotron, older, state_spaces
from vram.families.body import Body
from vram.families.decoders import DENSE, Decoder, build
from vram.families.routed import ROUTED

Builder = Callable[[ConfigReader], Body]


def _from(decoder: Decoder) -> Builder:
    return partial(build, decoder)


# Decoders that are served without their head: embeddings, and rerankers with a small one.
POOLING = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3")

ARCHITECTURES: dict[str, Builder] = {
    **{name: _from(decoder) for name, decoder in (DENSE | ROUTED).items()},
    **{
        f"{family}Model": encoders.without_head(DENSE[f"{family}ForCausalLM"]) for family in POOLING
    },
    **{
        f"{family}ForSequenceClassification": encoders.classifier(DENSE[f"{family}ForCausalLM"])
        for family in POOLING
    },
    "DeepseekV2ForCausalLM": latent.build,
    "DeepseekV3ForCausalLM": latent.build,
    "Glm4MoeLiteForCausalLM": latent.build,
    "JambaForCausalLM": hybrids.jamba,
    "Qwen3NextForCausalLM": hybrids.qwen3_next,
    "NemotronHForCausalLM": nemotron.build,
    "BambaForCausalLM": hybrids.bamba,
    "GraniteMoeHybridForCausalLM": hybrids.granite_hybrid,
    "MambaForCausalLM": state_spaces.mamba_1,
    "FalconMambaForCausalLM": state_spaces.mamba_1,
    "Mamba2ForCausalLM": state_spaces.mamba_2,
    "GPT2LMHeadModel": older.gpt2,
    "GPTBigCodeForCausalLM": older.gpt2,
    "GPTNeoXForCausalLM": older.gpt_neox,
    "OPTForCausalLM": older.opt,
    "BloomForCausalLM": older.bloom,
    "FalconForCausalLM": older.falcon,
    "Qwen2VLForConditionalGeneration": multimodal.qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": multimodal.qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": multimodal.qwen3_vl,
    "Qwen3VLMoeForConditionalGeneration": multimodal.qwen3_vl_moe,
    "Qwen3_5ForConditionalGeneration": multimodal.qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": multimodal.qwen3_5,
    "Gemma3ForConditionalGeneration": multimodal.gemma3,
    "Mistral3ForConditionalGeneration": multimodal.mistral3,
    "LlavaForConditionalGeneration": multimodal.llava,
    "Llama4ForConditionalGeneration": multimodal.llama4,
    "WhisperForConditionalGeneration": encoders.whisper,
    "BertModel": encoders.bert(),
    "BertForSequenceClassification": encoders.bert(head="classifier"),
    "RobertaModel": encoders.bert(position_offset=2),
    "RobertaForSequenceClassification": encoders.bert(position_offset=2, head="classifier"),
    "XLMRobertaModel": encoders.bert(position_offset=2),
    "XLMRobertaForSequenceClassification": encoders.bert(position_offset=2, head="classifier"),
    "ModernBertModel": encoders.modern_bert,
}
