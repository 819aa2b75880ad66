-- Run once by the image's entry point, when the volume is new: a role and a database for each use.
\set queue `cat /run/secrets/queue-password`
\set mlflow `cat /run/secrets/mlflow-password`
\set users `cat /run/secrets/users-password`
CREATE ROLE hpo_queue LOGIN PASSWORD :'queue';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE mlflow_users LOGIN PASSWORD :'users';
CREATE DATABASE hpo OWNER hpo_queue;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_users OWNER mlflow_users;
REVOKE ALL ON DATABASE hpo, mlflow, mlflow_users, postgres, template1 FROM PUBLIC;
