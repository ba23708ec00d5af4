"""Quality and cost of a model.

quality        evaluate: answers, options, metrics; options: its settings
metrics        exact match, ROUGE-L, intervals, paired differences
questions      tokenised examples and their prompts; outputs: the answer to each example, and its scores
generation     greedy answers; likelihood: log-likelihood of options that share a prompt
bertscore      BERTScore with a checked encoder
harness        lm-evaluation-harness; endpoint: a served model, reached through connection
certification  upper bounds on the loss of quality, and the largest number of layers they certify
costing        time and memory of training and inference, dense and pruned measured in turns
"""
