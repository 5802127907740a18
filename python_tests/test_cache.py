"""A KV cache of 4-bit codes: the same bits as without it, and where it is refused."""

import pytest
import torch
import transformers

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.integrations.attention_search import quantize_attention
from llmfp4_kernels.integrations.cache import fp4_cache

TOKENS = torch.arange(66).reshape(2, 33) * 37 % 128


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=60, intermediate_size=72, num_hidden_layers=2, head_dim=18)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_codes_changes_no_bit(dtype):
    """Prefill, steps and beam search."""
    model = llama().to(dtype)
    quantize_attention(model, TOKENS)
    for options in (dict(do_sample=False), dict(num_beams=3)):
        options |= dict(max_new_tokens=7, output_logits=True, return_dict_in_generate=True)
        cache = fp4_cache(model)
        packed = model.generate(TOKENS[:, :11], past_key_values=cache, **options)
        plain = model.generate(TOKENS[:, :11], **options)
        assert torch.equal(packed.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(packed.logits, plain.logits))
        keys = cache.layers[1].keys
        assert keys.dtype == torch.uint8 and keys.shape[1:] == (2, 17, 9)


def test_a_cache_of_codes_is_refused_where_keys_are_not_4_bit():
    model = llama()
    with pytest.raises(BadInput, match="in 0 layers"):
        fp4_cache(model)
    quantize_attention(model, TOKENS, products=("qk",))
    with pytest.raises(BadInput, match="2 of 2 layers"):
        fp4_cache(model)
    quantize_attention(model, TOKENS)
    model.config.sliding_window = 8
    with pytest.raises(BadInput, match="sliding"):
        fp4_cache(model)
