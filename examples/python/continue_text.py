"""Continues a text with a model: python continue_text.py MODEL_FOLDER TEXT"""

import sys

import mustafar

model = mustafar.Model(sys.argv[1])
session = mustafar.Session(model, kv=mustafar.KVConfig.preset("lossless"))

print(sys.argv[2], end="")
for piece in session.stream(sys.argv[2], max_new_tokens=64, temperature=0):
    print(piece, end="", flush=True)

memory = session.memory()
print(f"\n{session.position} tokens, KV cache {memory.used} bytes, ", end="")
print(f"dense it would be {memory.dense_equivalent}")
