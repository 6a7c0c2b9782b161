"""Imported once by the fork server, so that every CPU rank starts with warm modules."""

from transformers import AutoConfig, AutoModel  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
