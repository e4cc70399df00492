"""fastllama: a drop-in LlamaForCausalLM that generates the same tokens, faster."""
