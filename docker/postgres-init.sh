#!/bin/sh
# Three databases, each with a user of its own who can reach no other. Run once, by the image's entrypoint, on an empty
# volume. psql reads the passwords from the environment, so that no command line holds one.
set -eu

make() {
    psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
        --set name="$1" <<SQL
\getenv password $2
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name" TEMPLATE template0 ENCODING 'UTF8';
REVOKE CONNECT, TEMPORARY ON DATABASE :"name" FROM PUBLIC;
SQL
}

make prefect PREFECT_DB_PASSWORD
make mlflow MLFLOW_DB_PASSWORD
make optuna OPTUNA_DB_PASSWORD
