"""MERGE-PEFT: adapters of five domains, really trained, really merged, and what each keeps.

From the bottom up, each using only what is above it in this list:

- tasks: questions of five domains, checks of answers, the sandbox, leaks between splits
- public: public data sets as the same kind of items
- tiers: what is trained, merged and measured, as declarations; every size of the benchmark
- model: the base model, and running it whole or from a layer on
- stages: training, calibration, evaluation, routing, each by itself
- outcome: the journal of a run, and its labels and features
- report: tables of labels and the page of one run
- runs: a run from its plan to its files, and rows of a bank made again
- study: what damage can be foretold from
- results: the results page of several runs
"""
