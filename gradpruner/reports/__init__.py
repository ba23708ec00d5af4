"""Turns run.json or study.json into a self-contained HTML page, terminal output or markdown.

Nothing is recomputed.

fields     field types that tolerate missing and odd values; record: run.json and study.json as types
view       the rows of a record, their metrics, and which row to ship
verdict    the conclusion in one sentence; headline: the headline numbers; notes: the limits of the conclusion
shipping   which model to ship and why, and the next commands
tables     the results tables as plain data; details: all other tables; cells: cells, lines and tables
answers    sample answers of the dense and the pruned model, side by side
terminal   print_summary: the summary on the console; markdown: markdown_table
svg        draws one matplotlib figure as inline SVG
comparing  plots that compare rows; figures: other plots of a run; sweep: plots of an ablation
folders    finds the runs below a folder; serving: a server that shows them
html       render_html: fills the page's templates, section by section
"""
