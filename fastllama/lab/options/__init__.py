"""The option sweep: a table of llama.cpp's options over prompt files, each text beside the default's."""
