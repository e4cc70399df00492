"""Numbers in, numbers out: functions of tensors that know nothing of transformers."""
