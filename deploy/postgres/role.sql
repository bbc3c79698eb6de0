-- PostgreSQL's image runs this once, when it makes the database. voicepass owns its database, and is no superuser.
\set password `cat /run/secrets/database_password`
CREATE ROLE voicepass LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'password';
CREATE DATABASE voicepass OWNER voicepass;
REVOKE ALL ON DATABASE voicepass FROM PUBLIC;
