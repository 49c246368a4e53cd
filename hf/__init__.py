"""hf/: models as Hugging Face folders hold them. `tokenizer.py` reads a folder's tokenizer, without the libraries that wrote
it: those are what the tests compare with, and nothing here imports them.
"""
