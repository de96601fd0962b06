"""Plans as data: which steps are computed, the weights of the others, files and the Hub.

May import numpy, safetensors and, inside functions, huggingface_hub; nothing else of lesa.
"""
