"""hf/: models and their tokenizers as Hugging Face folders hold them, without the libraries that write such folders: the tests
compare with those, and nothing here imports them.
"""
