"""The score cache: a teacher's scores of texts, stored in a folder; numpy and bytes only."""
