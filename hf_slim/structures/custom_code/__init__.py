"""Code that is not of transformers: whether it treats units one by one, tried on a small copy or read."""

from .mixing_check import find_hook, find_strange
