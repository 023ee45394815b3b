"""Building blocks of a sharded sequential recommender.

Symbols of the whole project: ``B`` sequences, ``L`` positions, ``N`` real positions (padding
removed), ``D`` width, ``V`` catalog rows, ``R`` rows on this rank, ``K`` negatives, ``W`` ranks.
``item_id`` is the id in the user's log, ``item`` the dense global index in [0, V), ``row`` an index
local to one shard. "Line" denotes a row of any other matrix, such as the (N, R) logits.
"""
