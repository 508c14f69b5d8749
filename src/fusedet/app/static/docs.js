// The OpenAPI description of the server as a page: routes with their parameters, then the types of the answers.

import { getJson } from "./server.js";

const find = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A short name of a JSON schema's type; references link to their section. */
function describeType(schema) {
  if (!schema) return "";
  if (schema.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return make("a", { href: `#${name}`, textContent: name });
  }
  if (schema.anyOf) {
    const parts = schema.anyOf.filter((part) => part.type !== "null").map(describeType);
    return make("span", {}, ...parts, schema.anyOf.length > parts.length ? " or null" : "");
  }
  if (schema.type === "array") return make("span", {}, "list of ", describeType(schema.items));
  const limits = (schema.anyOf ?? [schema]).flatMap((part) => [
    part.minimum != null ? `from ${part.minimum}` : null,
    part.maximum != null ? `to ${part.maximum}` : null,
  ]);
  const kind = schema.format === "binary" || schema.contentMediaType ? "file" : schema.type ?? "any";
  return make("span", { textContent: [kind, ...limits.filter(Boolean)].join(" ") });
}

function makeTable(heads, rows) {
  if (!rows.length) return null;
  const cells = (tag, values) => values.map((value) => make(tag, tag === "th" ? { scope: "col" } : {}, value));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...cells("th", heads))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
  return make("div", { className: "scroll" }, table);
}

const code = (text) => make("code", { textContent: text });

function describeRoute(method, path, route, schemas) {
  const title = make("h2", {}, make("span", { className: "method", textContent: method.toUpperCase() }), " ", code(path));
  const form = route.requestBody?.content["multipart/form-data"]?.schema;
  const fields = Object.entries(schemas[form?.$ref?.split("/").at(-1)]?.properties ?? {});
  const parameters = [
    ...fields.map(([name, own]) => [code(name), describeType(own), own.description ?? "", "form"]),
    ...(route.parameters ?? []).map((own) => {
      const shown = own.schema.default == null ? "" : ` Default: ${own.schema.default}.`;
      return [code(own.name), describeType(own.schema), `${own.description ?? own.schema.description ?? ""}${shown}`, own.in];
    }),
  ];
  const answers = Object.entries(route.responses).map(([status, own]) => [
    status,
    describeType(Object.values(own.content ?? {})[0]?.schema),
    own.description,
  ]);
  return make("section", {}, title, make("p", { textContent: route.description ?? route.summary }),
    makeTable(["parameter", "type", "meaning", "in"], parameters), makeTable(["status", "answer", ""], answers));
}

function describeSchema(name, schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([key, own]) => [code(key), describeType(own), own.description ?? ""]);
  return make("section", { id: name }, make("h2", { textContent: name }),
    make("p", { textContent: schema.description ?? "" }), makeTable(["field", "type", "meaning"], rows));
}

async function start() {
  const { paths, components } = await getJson("openapi.json");
  const address = new URL("predict?score=0.3", document.baseURI);
  find("example").textContent = `curl -F image=@street.jpg "${address}"`;
  find("routes").replaceChildren(...Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, route]) => describeRoute(method, path, route, components.schemas))));
  const types = Object.entries(components.schemas).filter(([name]) => !/^Body_|ValidationError/.test(name));
  find("types").replaceChildren(...types.map(([name, schema]) => describeSchema(name, schema)));
}

start().catch((error) => {
  find("error").textContent = error.message;
  find("error").hidden = false;
});
