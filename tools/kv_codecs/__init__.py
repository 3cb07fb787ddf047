"""KV-cache codecs in PyTorch, compared by tools/kv_lab.py: research code, no part of the wheel.

model       a small Llama whose attention sees coded keys and values
codec       what a codec is, and the rows it is given
primitives  masks and scalar quantisers that codecs share
calibration statistics of a text, and the bases made from them
product     the codecs that the runtime has, or plans
published   other people's codecs of rows and blocks
tokens      methods that choose tokens or heads: eviction, mixed precision, streaming heads
transform   transform coding with static bits, and experiments on it
rows        the list of what is measured
"""
