"""Llama's layers on our cache: weights, rotary tables, the step and how it is compiled, the switches."""
