"""The engine of ``prepare`` that runs on Spark, with the pieces it needs; all need pyspark."""
