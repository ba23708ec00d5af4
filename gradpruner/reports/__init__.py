"""run.json or study.json -> one self-contained HTML page, terminal and markdown tables. Never recomputes.

fields     how records are read, whatever is in them; record: run.json and study.json as types
view       what every report shows: the rows of a record, and which one to ship
verdict    what the record shows, in one honest sentence, and the headline numbers; notes: what limits it
shipping   which model of a run is the one to ship, and why; the next commands
tables     results of runs and studies as plain data; details: the other tables; cells: what they are made of
answers    sample answers, dense beside pruned
terminal   print_summary: the summary on the console; markdown: markdown_table
svg        one matplotlib figure as inline SVG, and what figures are made of
comparing  plots of rows; figures: plots of a run; sweep: plots of an ablation
folders    the runs below a folder, as they stand; serving: a server that shows them
html       render_html: the page, section by section, and what fills its templates
"""
