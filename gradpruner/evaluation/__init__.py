"""Quality and cost of a model.

quality      evaluate: answers, options, metrics; options: what it is told
metrics      exact match, ROUGE-L, intervals, paired differences
questions    prompts as the model sees them; outputs: what it answered, row by row
generation   greedy answers; likelihood: options that share their prompt
bertscore    BERTScore with a checked encoder
harness      lm-evaluation-harness; endpoint: a server instead of a model, asked through connection
costing      time and memory of training and inference, dense and pruned in turns
"""
