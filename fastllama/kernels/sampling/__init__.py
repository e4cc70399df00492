"""Sampling: from scores to a token, row by row, without a question to the device.

Values are tensors [B], one for each row, so that a changed value is a changed tensor and nothing else. Tokens that
somebody ruled out have the score -inf, before and after; they are no candidates, and are never counted as such.
"""
