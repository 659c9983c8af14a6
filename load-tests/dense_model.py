"""Writes a GGUF's weights, dequantised, as the folder of safetensors and tokenizer files that other engines read.

python dense_model.py FOLDER_OF_GGUF GGUF_NAME OUT
"""

import sys

import torch
import transformers

folder, name, out = sys.argv[1:4]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
packed = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
if packed:
    sys.exit(f"error: weights were left as {packed}")
# It is a plain model now; with these marks it would refuse to be written.
model.hf_quantizer = None
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out, max_shard_size="100GB")
tokenizer.save_pretrained(out)
