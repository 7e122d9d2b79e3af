"""Adapters: importing this makes every variant known to PEFT."""

from .fvae import FvaeLoraConfig
from .glora import GloraConfig
from .loratrf import LoraTrfConfig
from .moslora import MosLoraConfig

__all__ = ["FvaeLoraConfig", "GloraConfig", "LoraTrfConfig", "MosLoraConfig"]
