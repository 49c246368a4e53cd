"""hf/: models and their tokenizers as Hugging Face folders hold them. Files are read by safetensors
and tokenizers; transformers and peft, which write such folders, are compared with by the tests.
"""
