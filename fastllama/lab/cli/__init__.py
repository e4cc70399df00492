"""fastllama generate: text in, text out, with the options of llama.cpp and of transformers."""
