"""What runs on one rank: model shapes, shard loading, LoRA layers, parallel primitives.

Needs torch, transformers and safetensors only (no deepspeed, no solvers). This file imports
nothing, so that the torch-free modules (`layout.shapes`, `layout.world`) stay cheap.
"""
