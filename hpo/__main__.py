from hpo.cli import program

program()
