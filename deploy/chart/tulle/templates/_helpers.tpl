{{/* Labels of every object. The argument is a list: the root, and the component. */}}
{{- define "tulle.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: tulle
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- end }}

{{/* What selects the pods of a component. It never changes. */}}
{{- define "tulle.selector" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: tulle
{{- end }}

{{/* Image. The argument is a list: the root, the name, and a tag that comes before that of all, if there is one. */}}
{{- define "tulle.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end -}}
{{ index . 1 }}:{{ coalesce (index (append . "") 2) $root.Values.image.tag $root.Chart.AppVersion }}
{{- end }}

{{/* Environment, in the order of names. The argument is a list of maps; what comes later wins. */}}
{{- define "tulle.env" -}}
{{- $all := dict -}}
{{- range . }}{{- range $name, $value := . }}{{- $_ := set $all $name $value }}{{- end }}{{- end }}
{{- range $name, $value := $all }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* Who and where the pod is. */}}
{{- define "tulle.downward" -}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: SERVICE_ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
- {name: INSTANCE_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}

{{/* Settings by which a proxy, of a node or of a gateway, finds control and proves who it is. */}}
{{- define "tulle.proxy" -}}
{{- $control := printf "https://control.%s.svc:15012" .Release.Namespace -}}
{{- dict "XDS_ADDRESS" $control
         "CA_ADDRESS" $control
         "XDS_ROOT_CA" "/var/run/secrets/istio/root-cert.pem"
         "CA_ROOT_CA" "/var/run/secrets/istio/root-cert.pem"
         "AUTH_TOKEN" "/var/run/secrets/tokens/istio-token"
         "TRUST_DOMAIN" .Values.trustDomain
         "CLUSTER_DOMAIN" .Values.clusterDomain
         "CLUSTER_ID" .Values.clusterId
         "RUST_LOG" .Values.log.level
         "LOG_FORMAT" .Values.log.format | toYaml }}
{{- end }}

{{/* The files of tulle.proxy. */}}
{{- define "tulle.proxyVolumes" -}}
- name: token
  projected:
    sources:
    - serviceAccountToken: {audience: istio-ca, expirationSeconds: 43200, path: istio-token}
- name: root-cert
  configMap: {name: tulle-ca-root-cert}
{{- end }}

{{- define "tulle.proxyMounts" -}}
- {name: token, mountPath: /var/run/secrets/tokens, readOnly: true}
- {name: root-cert, mountPath: /var/run/secrets/istio, readOnly: true}
{{- end }}

{{/* Secrets for the registry. */}}
{{- define "tulle.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Spread over nodes and zones, as far as it goes. */}}
{{- define "tulle.spread" -}}
topologySpreadConstraints:
- {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: { {{- include "tulle.flatSelector" . -}} }}}
- {maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: { {{- include "tulle.flatSelector" . -}} }}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm: {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: { {{- include "tulle.flatSelector" . -}} }}}
{{- end }}

{{- define "tulle.flatSelector" -}}
app.kubernetes.io/name: {{ . }}, app.kubernetes.io/part-of: tulle
{{- end }}

{{/* Of a container that needs no privilege. */}}
{{- define "tulle.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "tulle.confinedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}
