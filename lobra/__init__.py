"""LobRA on DeepSpeed: many LoRA adapters, one base model, replicas of different layouts.

The packages of the project are this package's own: ``lobra.tasks`` is the folder ``tasks`` of the
checkout, and so on (links; an installation holds copies).
"""
