"""The whole way on a tiny random model, so that it runs anywhere in seconds: profile, fit, save, load, apply."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnsieve
from attnsieve.show import plan_text

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
# A fresh model attends evenly to everything. With a constant in queries and keys its attention falls with distance (RoPE), more
# so from head to head, as it does in the local heads of real models.
for layer in model.model.layers:
    strength = torch.tensor([0.0, 2.0, 3.0, 4.0]).repeat_interleave(16)
    layer.self_attn.q_proj.bias.data += strength
    layer.self_attn.k_proj.bias.data += 1.0

# Observe: mean attention maps below 64 tokens, sums by column and by distance up to 256.
texts = torch.randint(0, 500, (8, 256))
profile = attnsieve.profile(model, [texts], pcl=64, lengths=(256,), progress=False)

# Choose: one pattern per layer and head. Any setting of the preset can be changed.
plan = attnsieve.fit(profile, preset="robust", floor=0.8)
with tempfile.TemporaryDirectory() as folder:
    plan.save_pretrained(folder)
    plan = attnsieve.Plan.from_pretrained(folder)
print(plan_text(plan))

# Run: transformers' own generate, prefill and decode sparse. Leaving the block restores the model.
prompt = torch.randint(0, 500, (1, 300))
with attnsieve.apply(model, plan) as handle:
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
print(handle.report())
