"""`xconv selftest`: is what this package computes, holds and predicts right on this device? A file for who develops it.

A test is a row of `groups.py`, named "group/name", that measures something and says what of it is off. Their order is
that of importance: those that do not begin before the time is up are left out, and named. The groups:

* `operators`: every operator against its reference on the CPU;
* `workspaces`: what convolutions allocate, against the planner's rule;
* `slices`, `seeds`: the draws of a forward that runs again, and fresh ones in every step, under CUDA graphs too;
* `gradients`: six networks by every codec, in three formats;
* `memory`: the peak of a step as predicted, audited and measured;
* `codecs`, `steps`: times, of encoding and decoding beside a copy, and of steps beside Inductor's.
"""
