"""Scoring of files that are larger than memory: chunk by chunk, one row out for each row in, resumable.

inputs    rows of a CSV, TSV, JSONL or Parquet file in chunks, with the text that the model sees
outputs   the same rows with the model's answers, as parts beside the output
run       what is done already, what is left, and the whole put together
"""
